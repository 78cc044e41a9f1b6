"""The compact form of a pruned model: kept values, packed masks, layers that compute from them."""
