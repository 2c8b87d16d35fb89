"""Faster loading, with other bits than the exact way: DATA.FAST_LOADING."""
