"""Hadamard matrices, by the constructions of Sylvester (1867) and Paley (1933).

A Hadamard matrix has the entries 1 and -1, and orthogonal rows. As a rotation it spreads every
direction evenly over all channels.
"""

import numpy as np


def matrix(order: int) -> np.ndarray | None:
    """A Hadamard matrix, or None if these constructions have none of this order.

    They have one of every power of two and of most multiples of 4, among them the widths of public
    ViTs: 192, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664. Paley's are built for primes only, not
    for their powers.

    Args:
      order: number of rows, from 1 on.

    Returns:
      float64 [order, order] of 1 and -1; divided by the root of `order`, it is orthogonal.
    """
    if order == 1:
        return np.ones((1, 1))
    if order % 2:
        return None
    smaller = matrix(order // 2)
    if smaller is not None:
        return np.kron([[1, 1], [1, -1]], smaller)
    return _paley_first(order) if _is_prime(order - 1) else _paley_second(order)


def _paley_first(order: int) -> np.ndarray | None:
    """Of order q + 1, where q is a prime that leaves 3 when divided by 4."""
    prime = order - 1
    if prime % 4 != 3:
        return None
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _characters(prime)
    return np.eye(order) + skew


def _paley_second(order: int) -> np.ndarray | None:
    """Of order 2 (q + 1), where q is a prime that leaves 1 when divided by 4."""
    prime = order // 2 - 1
    if prime % 4 != 1 or not _is_prime(prime):
        return None
    symmetric = np.zeros((prime + 1, prime + 1))
    symmetric[0, 1:] = symmetric[1:, 0] = 1
    symmetric[1:, 1:] = _characters(prime)
    pairs = np.kron(symmetric, [[1, 1], [1, -1]])
    return pairs + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])


def _characters(prime: int) -> np.ndarray:
    """1 where i - j is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    character = np.full(prime, -1.0)
    character[np.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    index = np.arange(prime)
    return character[(index[:, None] - index) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
