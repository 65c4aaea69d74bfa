"""A Bridge training under torchrun, in a folder, with changes to the GPT of ``bridge_worker``.

``torchrun … -m tests.verify.bridge_training FOLDER JSON``; it needs Bridge's packages on the path.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.megatron.bridge_worker import train

if __name__ == "__main__":
    folder, options = sys.argv[1:]
    train(Path(folder), int(os.environ["RANK"]), every=1, **json.loads(options))
