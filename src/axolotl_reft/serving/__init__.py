"""LoReFT adapters in vLLM, as a plugin that its ``--enable-lora`` finds."""

import logging
import multiprocessing

from packaging.specifiers import SpecifierSet

# The releases that the tests were run with.
SUPPORTED = ">=0.32,<0.33"
_logger = logging.getLogger("vllm.axolotl_reft")


def register() -> None:
    """Make LoReFT adapters known to vLLM, in each of its processes; on a release that
    was not tested, say so and change nothing."""
    import vllm

    found = vllm.__version__
    try:
        if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
            raise ValueError(f"it was tested with vLLM {SUPPORTED} alone")
        from axolotl_reft.serving.patches import apply_patches

        apply_patches()
    except Exception as error:  # a server that does not use the plugin must go on
        if multiprocessing.parent_process() is None:
            _logger.warning(
                "LoReFT adapters cannot be served by vLLM %s (%s); nothing is changed",
                found,
                error,
            )
