"""Which strategy runs at each site."""
