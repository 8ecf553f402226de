"""The control plane: accounts, organizations, API keys, quotas, instances, usage, the audit log."""
