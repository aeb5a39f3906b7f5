"""The rest point of a FitzHugh-Nagumo site, (a, b) = (0.7, 0.8), where fhn.py and fhn_triton.py start."""

REST_V = -1.19940803524403447788720273721  # v - v^3 / 3 = w and v + 0.7 = 0.8 w
REST_W = -0.624260044055043722359003421512
