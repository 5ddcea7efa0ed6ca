"""The parts of scripts/train_pico.py, and the few names that all of them share.

corpus -> model, ngram -> export -> training -> card, each knowing only those before it. None of
them knows about serving, nor about the command line but for its parsed options.
"""

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
