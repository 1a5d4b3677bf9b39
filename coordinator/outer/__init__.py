"""The outer step: contributions merged, masters stepped, the delta encoded, in one pass over memory."""
