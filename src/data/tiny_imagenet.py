"""Temporary."""

from src.data.folder import TinyImageNet, obtain_tiny_imagenet

__all__ = ["TinyImageNet", "obtain_tiny_imagenet"]
