"""Which documents are held out, and in which order an epoch reads the others.

Both come from one hash of document numbers instead of a random generator, whose stream a new
version of its library may change: a run resumed years later must find the same order.
"""

import numpy as np

from torchtitan_mtp.errors import UserError

SPLITS = ("train", "validation", "all")


def split_documents(
    num_documents: int, split: str, fraction: float, seed: int, name: str
) -> np.ndarray:
    """Numbers of the documents in a split, ascending, int64.

    "validation" is every document whose hash of (seed, number), as a number in [0, 1), lies below
    `fraction`; "train" is the others; each has at least one document. "all" is every document, and
    so is "train" where there is nothing to hold out (fraction 0, or a single document).

    Raises:
        UserError: "validation" of a single document, or with fraction 0.
        ValueError: no such split, or a fraction outside [0, 1).
    """
    if split not in SPLITS or not 0 <= fraction < 1:
        raise ValueError(f"split {split!r} (of {SPLITS}) with validation fraction {fraction}")
    documents = np.arange(num_documents)
    if split == "all":
        return documents
    if fraction == 0 or num_documents < 2:
        if split == "train":
            return documents
        found = f"{num_documents} document" if fraction else "training.validation_fraction = 0"
        raise UserError(
            f"dataset {name}: {found}, so none can be held out for validation; give"
            " validation.dataset and validation.dataset_path, or turn validation.enable off"
        )
    hashes = _hash(documents, seed)
    held_out = hashes < np.uint64(int(fraction * 2**64))
    held_out[np.argmin(hashes)] = True
    held_out[np.argmax(hashes)] = False
    return documents[held_out if split == "validation" else ~held_out]


def shuffled(documents: np.ndarray, *keys: int) -> np.ndarray:
    """The documents in the order of the keys: (seed, epoch); of runs whose documents were dealt to
    lanes, (seed, lane, epoch)."""
    return documents[np.argsort(_hash(documents, *keys), kind="stable")]


def _hash(numbers: np.ndarray, *keys: int) -> np.ndarray:
    """64 well-mixed bits for each number and the keys, uint64."""
    state = _mix(numbers.astype(np.uint64))
    for key in keys:
        # + 1: key 0 mixes too; the order of the keys matters as each round mixes the last one's.
        state = _mix(state ^ _mix(np.array([(key + 1) % 2**64], dtype=np.uint64)))
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele, Lea & Flood 2014), on a uint64 array; wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
