"""The trainers: each says which rows and columns it needs and which loss; the rooms below do the work."""
