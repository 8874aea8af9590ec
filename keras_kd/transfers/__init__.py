"""Which loss reads which layers of either model, through which projector, with what weight."""
