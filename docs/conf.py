"""How Sphinx builds this site: ``tox -e docs``, where warnings are errors.

Nothing is asked of the network: names of other libraries stay text, without links.
"""

import sys
from pathlib import Path

import fabric_init

sys.path.insert(0, str(Path(__file__).parent))  # for command_help

project = "fabric_init"
author = "the fabric_init authors"
copyright = "the fabric_init authors, Apache-2.0"
version = release = fabric_init.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "command_help"]
html_theme = "furo"
html_title = "fabric_init"

myst_heading_anchors = 3  # links such as page.md#a-heading, as on GitHub

python_maximum_signature_line_length = 88  # longer ones have a line for each argument
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|lightning|lightning_fabric|deepspeed)\b.*"),
    ("py:.*", r"(abc|collections|contextlib|datetime|enum|os|pathlib|typing|weakref)\b.*"),
    ("py:.*", r"fabric_init(\.\w+){3,}"),  # deeper than the public modules: nobody's business but our own
]
nitpick_ignore = [
    ("py:class", name)
    for name in (
        *("_DEVICE", "_POLICY", "_SHARDING_STRATEGY", "Accelerator", "CheckpointIO", "CPUOffload"),  # Lightning's
        *("DeviceMesh", "Io", "MixedPrecision", "Precision"),
        "DeepSpeedEngine",  # imported for types alone, as are the other short names
        "Kind",
        "Optimizer",
        "Tensor",
        "TensorRef",
        "tuple[str",  # of `tuple[str, ...]`, which napoleon takes apart at the comma
    )
]
