"""The arrays that messages are made of: numpy columns, one entry per sequence or per token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
UInt8Array = NDArray[np.uint8]

NO_INT32: Int32Array = np.empty(0, np.int32)
NO_FLOAT32: Float32Array = np.empty(0, np.float32)
