"""Operators that combine layers, scales, channels or time into one."""
