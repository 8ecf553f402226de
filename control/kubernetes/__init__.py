"""Kubernetes: the resource, the operator that keeps its word, and what the gateway and the control plane share with it.

client → reflector → queue is the way in (what the cluster says), apply the way out (what we want of it), lease decides
who of several operators works. Nothing else in the tree imports this package, except inside functions and only where
Kubernetes is configured: kubernetes-asyncio comes with the extra of setup.cfg that is named so.
"""
