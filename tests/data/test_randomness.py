"""Numbers that are functions of their key, the same for ever; and an import that stays light."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from coterie.data.randomness import hash_key, permutation


def test_the_hash_is_splitmix64():
    # The first outputs of the published generator seeded with 0 and with 1234567.
    assert hash_key(0).tolist() == [0xE220A8397B1DCDAF]
    assert hash_key(1234567).tolist() == [6457827717110365317]


def test_orders_and_splits_stay_what_they_are():
    assert permutation(10, 0, 0).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert hash_key(-1, 2).tolist() != hash_key(2, -1).tolist()


def test_every_permutation_is_one_and_they_are_uniform():
    firsts = [permutation(5, seed, 1) for seed in range(2000)]
    assert all(sorted(order) == list(range(5)) for order in firsts)
    for place in range(5):
        counts = np.bincount([order[place] for order in firsts], minlength=5)
        assert np.abs(counts - 400).max() < 80  # four standard deviations


def test_importing_the_readers_loads_none_of_what_they_read_with():
    code = (
        "import sys, coterie.data\n"
        "heavy = {'timm', 'torchvision', 'pyarrow', 'datasets', 'sklearn', 'pandas', 'matplotlib', 'webdataset'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
