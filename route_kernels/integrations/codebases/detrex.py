"""detrex: deformable attention on our ops, and detrex without compiling it.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model alone

detrex has a file of the same kind as mmcv's, over an extension `detrex._C` of its own. Where that is not compiled,
detrex has a class that only raises in the place of its attention module; so `apply()` before the first import of
detrex provides `detrex._C` with the two functions of deformable attention.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from ..codebase import PLAIN, Report
from ..extension import is_not_compiled
from ..importable import MultiScaleDeformableAttention
from . import mmcv

EXTENSION = "detrex._C"


def _provide_extension(report: Report) -> None:
    if "detrex" not in sys.modules and is_not_compiled("detrex", EXTENSION):
        name = f"import {EXTENSION}"
        report.replace(sys.modules, EXTENSION, MultiScaleDeformableAttention, name=name, op=PLAIN)


_PACKAGE = replace(
    mmcv.PACKAGE, name="detrex", module="detrex.layers.multi_scale_deform_attn", install="detrex",
    extension=EXTENSION, provide=_provide_extension,
)  # fmt: skip
apply, revert = _PACKAGE.apply, _PACKAGE.revert
