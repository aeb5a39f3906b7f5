"""
Rotors of Spin(8): rotations of 8 dimensions as products of 28 plane rotations, and their action on antisymmetric pairs.
"""

import torch

from kernels.e7 import TokensFirst


def rotor_rounds():
    """The 28 planes (i, j) of 8 dimensions in 7 rounds of 4 disjoint ones: partner, plane and sign, 7 lists of 8 each.

    Round r pairs 7 with r and r + k with r - k mod 7, as a tournament does; rotations of one round commute.
    """
    partner, plane, sign = ([[0] * 8 for _ in range(7)] for _ in range(3))
    for r in range(7):
        for n, (i, j) in enumerate([(7, r), *(((r + k) % 7, (r - k) % 7) for k in (1, 2, 3))]):
            partner[r][i], partner[r][j], sign[r][i], sign[r][j] = j, i, -1, 1
            plane[r][i] = plane[r][j] = 4 * r + n
    return partner, plane, sign


ROTOR_ROUNDS = rotor_rounds()


def rotation(angles):
    """R in SO(8), that of the rotor prod exp(angle / 2 e_j e_i) over all planes: angles (..., 28) -> (..., 8, 8)."""
    partner, plane, sign = (torch.tensor(t, device=angles.device) for t in ROTOR_ROUNDS)
    a = angles.reshape(-1, 28).mT  # (28, N): tokens last, rows are long
    cos = a.cos().index_select(0, plane.flatten()).view(7, 8, 1, -1)
    sin = (a.sin().index_select(0, plane.flatten()) * sign.view(56, 1)).view(7, 8, 1, -1)
    R = torch.eye(8, dtype=a.dtype, device=a.device)[:, :, None]
    for r in range(7):  # row i: cos row_i -+ sin row_j
        R = cos[r] * R + sin[r] * R.index_select(0, partner[r])  # (8, 8, N)
    return R.permute(2, 0, 1).unflatten(0, angles.shape[:-1])


def rotate_pairs(R, v):
    """R X R^T for antisymmetric X with v (m, 56) above the diagonal, two X per row: R (..., 64) -> (..., 56 m)."""
    shape, (i, j) = R.shape[:-1], torch.triu_indices(8, 8, 1, device=R.device)
    X = v.new_zeros(len(v) * 2, 64).index_copy(1, 8 * i + j, v.reshape(-1, 28)).view(-1, 8, 8)
    R = R.flatten(0, -2).mT.unflatten(0, (8, 8))  # (8, 8, N): tokens last, as `rotation` left them
    RX = torch.bmm((X - X.mT).mT.flatten(0, 1).expand(8, -1, -1), R).unflatten(1, (-1, 8))  # (8, 2 m, 8, N)
    turned = (RX.index_select(0, i) * R.index_select(0, j)[:, None]).sum(2)  # (28, 2 m, N)
    return TokensFirst.apply(turned).flatten(1).unflatten(0, shape)
