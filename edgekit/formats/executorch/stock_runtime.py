"""What the stock runners on phones have and a device with edgekit has not: needs torch."""

import importlib

from edgekit.errors import MissingDependencyError
from edgekit.runtime.silence import silence


def add_llm_kernels() -> None:
    """Let programs of the variant ``llm-ops`` run in this process.

    The wheel has these kernels in a library that is linked with torch; it registers them in the
    runtime that every program in the process uses.

    Raises:
        MissingDependencyError: If torch or ExecuTorch is not installed.
    """
    try:
        with silence():
            import torch  # noqa: F401 - the kernels are linked with it

            importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    except ImportError as error:
        raise MissingDependencyError(
            f"the kernels of phone runners need torch and ExecuTorch ({error})",
            hint="pip install 'edgekit[executorch]'",
        ) from error
