"""Folders of the checkout, and of the real images that lie beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SHARED_DATA = SHARED / "data"
# Recipes whose images come with a package.
WITHOUT_ROOT = ("quickstart", "digits")
