"""Random numbers that depend only on where they are used, so that a resumed run draws the same ones."""

from hashlib import blake2b


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path such as (run seed, round, stage, chunk); equal paths, equal seeds."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
