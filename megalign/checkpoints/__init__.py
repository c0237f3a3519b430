"""torch_dist checkpoints without ranks or Megatron: to and from Hugging Face directories, tensor by tensor."""
