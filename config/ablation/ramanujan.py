# Positions by Ramanujan sums and the waves below them: a fixed table and a learned projection.
out_dir = "out-ablation/ramanujan"
pos_embedding = "ramanujan"
