# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the machine's driver can do."""

import functools
import json

from .face import NATIVE


@functools.cache
def offered() -> frozenset[str]:
    """Names of the features that the driver offers, without `UBLK_F_`."""
    features = json.loads(NATIVE.run("features", "--json").out)
    return frozenset(name for name, feature in features.items() if feature["here"])


def has(feature: str) -> bool:
    """Whether the driver offers a feature, by its name without `UBLK_F_`."""
    return feature in offered()
