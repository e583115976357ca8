"""Tests run from the repo root, on one thread (their models are tiny), and never from the network."""
import os
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')       # for the processes they start, too
os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, '.')
