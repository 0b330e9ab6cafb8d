"""Random words for what a process does to each position, several times over where it draws several times."""

from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops.checks import stream as check_stream
from di4c_ext.ops.reference.philox import COIN, stream_word


def coins(caller: str, keys: Tensor, draws: int, length: int, stream: int) -> tuple[Tensor, Tensor]:
    """Two words of 64 bits for each draw and position, (B, draws, D) int64 each: the first n draws of n or more.

    Draw l of position d is number l D + d of the stream's coins; one draw's are those of `random.uniform`.
    """
    check_stream(caller, stream)
    words = ops.random_bits(keys, draws * length, stream_word=stream_word(stream, COIN))
    first, second = words.view(keys.shape[0], draws, length, 2).unbind(-1)
    return first, second
