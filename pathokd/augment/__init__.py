"""Stain and scanner variation: pure functions, and albumentations transforms over them."""
