"""What Optimum imports to find edgekit's command; in the wheel, where Optimum looks."""  # noqa: INP001

from edgekit.optimum_command import REGISTER_COMMANDS


__all__ = ["REGISTER_COMMANDS"]
