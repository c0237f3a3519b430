"""From rows to packed batches: reading, chat templates, tokens and loss masks, packing, order, collation."""
