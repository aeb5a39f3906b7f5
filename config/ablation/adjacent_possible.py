# A sublayer moves a token's vector by at most half of its length.
out_dir = "out-ablation/adjacent_possible"
adjacent_possible = 0.5
