"""Role-based access as the API server decides it: the sum of all rules that are bound to a user, and nothing else."""

from collections.abc import Callable, Iterable
from typing import Any

Object = dict[str, Any]
# every object of a kind
Read = Callable[[str], Iterable[Object]]


def groups_of(user: str) -> set[str]:
    groups = {"system:authenticated"}
    if user.startswith("system:serviceaccount:"):
        namespace = user.split(":")[2]
        groups |= {"system:serviceaccounts", f"system:serviceaccounts:{namespace}"}
    return groups


def allowed(read: Read, user: str, verb: str, group: str, resource: str, namespace: str, name: str) -> bool:
    """`resource` is `statefulsets` or `statefulsets/scale`; `namespace` "" means the whole cluster."""
    for binding in read("ClusterRoleBinding"):
        if _binds(binding, user) and _permits(_rules(read, binding), verb, group, resource, name):
            return True
    if namespace:
        for binding in read("RoleBinding"):
            if binding["metadata"]["namespace"] == namespace and _binds(binding, user):
                if _permits(_rules(read, binding), verb, group, resource, name):
                    return True
    return False


def refusal(user: str, verb: str, group: str, resource: str, namespace: str, name: str) -> str:
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    what = f"{resource.split('/')[0]}{'.' + group if group else ''} {chr(34) + name + chr(34) + ' ' if name else ''}"
    return f'{what}is forbidden: User "{user}" cannot {verb} resource "{resource}" in API group "{group}" {where}'


def _binds(binding: Object, user: str) -> bool:
    for subject in binding.get("subjects") or ():
        if subject["kind"] == "ServiceAccount":
            namespace = subject.get("namespace") or binding["metadata"].get("namespace", "")
            if user == f"system:serviceaccount:{namespace}:{subject['name']}":
                return True
        elif subject["kind"] == "User" and subject["name"] == user:
            return True
        elif subject["kind"] == "Group" and subject["name"] in groups_of(user):
            return True
    return False


def _rules(read: Read, binding: Object) -> list[Object]:
    reference = binding["roleRef"]
    namespace = binding["metadata"].get("namespace", "") if reference["kind"] == "Role" else ""
    for role in read(reference["kind"]):
        if role["metadata"]["name"] == reference["name"] and role["metadata"].get("namespace", "") == namespace:
            return role.get("rules") or []
    return []


def _permits(rules: list[Object], verb: str, group: str, resource: str, name: str) -> bool:
    for rule in rules:
        if not {verb, "*"} & set(rule.get("verbs", ())) or not {group, "*"} & set(rule.get("apiGroups", ())):
            continue
        part = resource.partition("/")[2]
        if not {resource, "*", f"*/{part}" if part else resource} & set(rule.get("resources", ())):
            continue
        if not rule.get("resourceNames") or name in rule["resourceNames"]:
            return True
    return False
