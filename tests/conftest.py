"""Tests run from the repo root, on one thread unless they say otherwise, and never from the network."""
import os
import sys

os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, '.')
