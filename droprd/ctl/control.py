"""Calls to the daemon, as droprctl makes them."""

from droprd.net.control import Control

__all__ = ["Control"]
