"""Detection: windows of one map, pooled, scored and made into boxes (section 4)."""
