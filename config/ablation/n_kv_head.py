# All query heads share one head of keys and values.
out_dir = "out-ablation/n_kv_head"
n_kv_head = 1
