"""Generation and rewards: the engine's protocol, vLLM behind it, each completion scored once in the job."""
