"""Loss terms, one file each: a Step to a scalar."""
