# Errors go back through the signs of the weights. The head has an embedding of its own, as every such rule needs.
out_dir = "out-local"
method = "sign_sym"
tie_weights = False
