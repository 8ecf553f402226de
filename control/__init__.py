"""The control plane: accounts, organizations, keys, quotas. Not built yet."""
