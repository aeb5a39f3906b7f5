# Logits within (-15, 15).
out_dir = "out-ablation/softcap"
logit_softcap = 15.0
