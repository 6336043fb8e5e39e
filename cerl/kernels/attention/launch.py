"""How a kernel of attention is launched: block sizes, warps, stages and registers of a program."""

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """An entry of the tables CONFIGS; what rows and columns are blocks of depends on the kernel."""

    rows: int  # of queries in a block
    columns: int  # of keys in a block
    warps: int
    stages: int  # rounds of a loop whose loads are under way at once
    registers: int | None = None  # most of a thread; None leaves it to the compiler
    parts: int = 1  # programs that share the rows of a head, in kernels that take whole heads

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}
