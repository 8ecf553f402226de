"""The API server of one cluster, on kubernetes-asyncio's ApiClient: objects are dictionaries, every call is timed.

The generated classes of kubernetes-asyncio are not used: a dictionary is what the server sends, and a field that we do
not know survives the way back. What we take from it is its configuration (kubeconfig with exec plugins, the service
account's token and its renewal) and its connection pool.
"""

import asyncio
import contextlib
import logging
import os
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config, refresh_token
from yaml import YAMLError  # of kubernetes-asyncio

import redisgate

log = logging.getLogger(__name__)


Object = dict[str, Any]

# one call, from connecting to the last byte; a server that needs longer is treated as one that is away
CALL_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
# calls in flight at one time; further ones wait for a connection, and their wait counts
CONNECTIONS: Final = 64
# objects in one answer to a list
PAGE: Final = 500
# between two looks at the credentials that a plugin of a kubeconfig makes
CREDENTIAL_SECONDS: Final = 60
# one event of a watch; etcd refuses objects above 1.5 MiB, and JSON of Secrets is a third larger than what it holds
EVENT_BYTES: Final = 8 * 1024 * 1024

# read from a socket at one time; an event of a watch is one line
READ_BYTES: Final = 2 * 1024 * 1024

SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount/token"


class KubernetesError(Exception):
    """Anything that went wrong with the cluster. `str()` is for people."""


class NotConfigured(KubernetesError):
    """There is no usable kubeconfig, or we are not in a cluster."""


class Unavailable(KubernetesError):
    """No answer, or one that asks to come again: connecting, a timeout, 429, 500, 502, 503, 504."""


class ApiError(KubernetesError):
    """The API server refused the call. `status` is HTTP's; `reason` and `details` as in its Status object."""

    def __init__(self, status: int, reason: str, message: str, details: Object) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.details = details


class NotFound(ApiError):
    """404: no such object, or no such resource on this server."""


class Conflict(ApiError):
    """409: the object has changed, belongs to another field manager, or has another uid than the one expected."""


class AlreadyExists(Conflict):
    """409 to a POST."""


class Gone(ApiError):
    """410: this resourceVersion is too old to go on from."""


class Forbidden(ApiError):
    """401 and 403: our rights do not reach that far. The message names the verb and the resource."""


class Invalid(ApiError):
    """400 and 422: the server does not accept the object. The message names the field."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One collection of the API. `api_version` is `group/version`, or `v1` for the core group."""

    api_version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """`namespace` None means all of them, or a resource that lives in none."""
        root = "/apis/" if "/" in self.api_version else "/api/"
        parts = [root + self.api_version]
        if namespace is not None and self.namespaced:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/".join(parts)


CONFIG_MAPS: Final = Resource("v1", "configmaps", "ConfigMap")
EVENTS: Final = Resource("v1", "events", "Event")
LIMIT_RANGES: Final = Resource("v1", "limitranges", "LimitRange")
NAMESPACES: Final = Resource("v1", "namespaces", "Namespace", namespaced=False)
PODS: Final = Resource("v1", "pods", "Pod")
RESOURCE_QUOTAS: Final = Resource("v1", "resourcequotas", "ResourceQuota")
SECRETS: Final = Resource("v1", "secrets", "Secret")
SERVICE_ACCOUNTS: Final = Resource("v1", "serviceaccounts", "ServiceAccount")
SERVICES: Final = Resource("v1", "services", "Service")
VOLUME_CLAIMS: Final = Resource("v1", "persistentvolumeclaims", "PersistentVolumeClaim")
DEPLOYMENTS: Final = Resource("apps/v1", "deployments", "Deployment")
STATEFUL_SETS: Final = Resource("apps/v1", "statefulsets", "StatefulSet")
CRON_JOBS: Final = Resource("batch/v1", "cronjobs", "CronJob")
JOBS: Final = Resource("batch/v1", "jobs", "Job")
LEASES: Final = Resource("coordination.k8s.io/v1", "leases", "Lease")
INGRESSES: Final = Resource("networking.k8s.io/v1", "ingresses", "Ingress")
NETWORK_POLICIES: Final = Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy")
DISRUPTION_BUDGETS: Final = Resource("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget")
ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "roles", "Role")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding")
CUSTOM_RESOURCES: Final = Resource(
    "apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
ADMISSION_POLICIES: Final = Resource(
    "admissionregistration.k8s.io/v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", namespaced=False
)
ADMISSION_BINDINGS: Final = Resource(
    "admissionregistration.k8s.io/v1",
    "validatingadmissionpolicybindings",
    "ValidatingAdmissionPolicyBinding",
    namespaced=False,
)
# of others; a cluster may not have them
CERTIFICATES: Final = Resource("cert-manager.io/v1", "certificates", "Certificate")
POD_MONITORS: Final = Resource("monitoring.coreos.com/v1", "podmonitors", "PodMonitor")
INSTANCES: Final = Resource("redisgate.io/v1", "redishttpinstances", "RedisHttpInstance")

_KNOWN: Final = {
    (resource.api_version, resource.kind): resource
    for resource in tuple(globals().values())
    if isinstance(resource, Resource)
}


def resource_of(manifest: Object) -> Resource:
    """The collection that an object with `apiVersion` and `kind` belongs to. Raises KeyError for one we never use."""
    return _KNOWN[manifest["apiVersion"], manifest["kind"]]


def key_of(item: Object) -> tuple[str, str]:
    """(namespace, name); the namespace of what lives in none is empty."""
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


class KubernetesClient:
    """Make one with `connect()`; it belongs to the event loop it was made on. Close it with `close()`."""

    def __init__(self, api: ApiClient, host: str) -> None:
        self._api = api
        self.host = host
        # where we are, if in a pod: the namespace of our service account
        self.namespace = _own_namespace()
        self._renewal: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> "KubernetesClient":
        """`kubeconfig` is a path, several joined by ":", or None: the pod's service account, else KUBECONFIG, else
        ~/.kube/config. Talks to nobody yet. Raises NotConfigured."""
        configuration = Configuration()
        loader = None
        try:
            if kubeconfig is None and _own_namespace() is not None:
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                path = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
                loader = await load_kube_config(
                    config_file=path, context=context, client_configuration=configuration, persist_config=False
                )
        except (ConfigException, OSError, ValueError, YAMLError) as error:
            raise NotConfigured(f"no way to a Kubernetes cluster: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:  # what the library makes of a file that has another form
            raise NotConfigured("no way to a Kubernetes cluster: the kubeconfig is no YAML of a kubeconfig") from error
        configuration.connection_pool_maxsize = CONNECTIONS
        api = ApiClient(configuration)
        if not urllib.request.getproxies():
            # Its session asks a thread for a proxy and a .netrc at each request: 0.4 of 1.1 ms. There are none to find.
            former = api.rest_client.pool_manager
            api.rest_client.pool_manager = aiohttp.ClientSession(connector=former.connector, read_bufsize=READ_BYTES)
            former.detach()
        client = cls(api, str(configuration.host).rstrip("/"))
        if loader is not None:
            client._renewal = asyncio.create_task(refresh_token(loader, configuration, CREDENTIAL_SECONDS))
        return client

    async def close(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._renewal
        await self._api.close()

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """Raises NotFound and the rest of this module's errors, as all calls do."""
        return await self.call("GET", resource.path(namespace, name))

    async def list_all(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """All objects that match both selectors, of one moment. Raises Gone when reading the pages took too long."""
        items: list[Object] = []
        async for page, _ in self.pages(resource, namespace, labels=labels, fields=fields):
            items += page
        return items

    async def pages(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[list[Object], str]]:
        """Pages of at most PAGE objects, each with the resourceVersion that the whole list has."""
        query = {"limit": str(PAGE)} | _selectors(labels, fields)
        while True:
            answer = await self.call("GET", resource.path(namespace), query=query)
            items = answer.get("items") or []
            for item in items:  # objects inside a list come without the two
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind)
            metadata = answer["metadata"]
            yield items, metadata["resourceVersion"]
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def create(self, item: Object, *, field_manager: str = "") -> Object:
        """POST. Raises AlreadyExists."""
        query = {"fieldManager": field_manager} if field_manager else {}
        path = resource_of(item).path(item["metadata"].get("namespace"))
        return await self.call("POST", path, query=query, body=item)

    async def replace(self, item: Object, *, subresource: str | None = None) -> Object:
        """PUT. Raises Conflict when `item` names a resourceVersion that is not the newest."""
        namespace, name = key_of(item)
        return await self.call("PUT", resource_of(item).path(namespace, name, subresource), body=item)

    async def apply(
        self, item: Object, *, field_manager: str, force: bool = False, subresource: str | None = None
    ) -> Object:
        """Server-side apply. Raises Conflict when another manager owns a field and `force` is not given, or when
        `item` names a uid that is not the object's."""
        namespace, name = key_of(item)
        return await self.call(
            "PATCH",
            resource_of(item).path(namespace, name, subresource),
            query={"fieldManager": field_manager, "force": "true" if force else "false"},
            body=item,
            content_type="application/apply-patch+yaml",
        )

    async def merge(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        patch: Object,
        *,
        subresource: str | None = None,
        field_manager: str = "",
    ) -> Object:
        """A merge patch (RFC 7386): null removes a field, lists are replaced."""
        return await self.call(
            "PATCH",
            resource.path(namespace, name, subresource),
            query={"fieldManager": field_manager} if field_manager else {},
            body=patch,
            content_type="application/merge-patch+json",
        )

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        propagation: str = "Background",
    ) -> None:
        """Ask for the end of an object; finalizers may keep it for a while. With `uid`, only of this very object:
        raises Conflict if another one has taken the name. Raises NotFound."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        await self.call("DELETE", resource.path(namespace, name), body=body)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        version: str,
        *,
        labels: str = "",
        fields: str = "",
        seconds: int,
        silence: float,
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events from `version` on: (ADDED, MODIFIED, DELETED or BOOKMARK, object). The server is asked to end after
        `seconds`; `silence` seconds without a byte, not even a bookmark, raise Unavailable. Raises Gone."""
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        } | _selectors(labels, fields)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, connect=CONNECT_SECONDS, sock_read=silence
        )
        try:
            response = await self._send("GET", resource.path(namespace), query, None, "application/json", timeout)
            async with response:
                if response.status != 200:
                    raise _refused(response.status, await response.read(), response.reason)
                buffer = bytearray()
                async for chunk in response.content.iter_any():
                    buffer += chunk
                    *lines, rest = buffer.split(b"\n")
                    buffer = rest
                    if len(buffer) > EVENT_BYTES:
                        raise Unavailable(f"{self.host} sent an event of more than {EVENT_BYTES:,} bytes")
                    for line in lines:
                        event = msgspec.json.decode(line)
                        if event["type"] == "ERROR":
                            raise _refused_with(event["object"])
                        yield event["type"], event["object"]
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise self._away(error) from error

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Object | list[Object] | None = None,
        content_type: str = "application/json",
        seconds: float = CALL_SECONDS,
    ) -> Object:
        """One request and its whole answer, in at most `seconds`."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            response = await self._send(method, path, query or {}, body, content_type, timeout)
            async with response:
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._away(error) from error
        if response.status >= 300:
            raise _refused(response.status, data, response.reason)
        try:
            answer: Object = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise Unavailable(f"{self.host} answered something that is not JSON") from error
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: object,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        headers = {
            "Accept": "application/json",
            "Content-Type": content_type,
            "User-Agent": f"redisgate/{redisgate.__version__}",
        }
        try:
            await self._api.update_params_for_auth(headers, [], ["BearerToken"])
        except ConfigException as error:
            raise NotConfigured(f"the credentials of {self.host} cannot be read: {error}") from error
        response: aiohttp.ClientResponse = await self._api.rest_client.request(
            method,
            self.host + path,
            query_params=query,
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=timeout,
        )
        return response

    def _away(self, error: Exception) -> Unavailable:
        what = "did not answer in time" if isinstance(error, TimeoutError) else f"cannot be reached: {error}"
        return Unavailable(f"the Kubernetes API at {self.host} {what}")


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {name: value for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}


def _refused(status: int, data: bytes, reason: str | None) -> KubernetesError:
    try:
        answer = msgspec.json.decode(data)
    except msgspec.DecodeError:
        answer = None
    if not isinstance(answer, dict) or answer.get("kind") != "Status":
        answer = {"message": data[:200].decode(errors="replace") or reason or f"HTTP {status}"}
    return _refused_with(answer | {"code": status})


def _refused_with(answer: Object) -> KubernetesError:
    status = int(answer.get("code") or 500)
    reason = str(answer.get("reason") or "")
    message = str(answer.get("message") or reason or f"HTTP {status}")
    if status == 429 or status >= 500:
        return Unavailable(f"the Kubernetes API is unwell: {message}")
    family: type[ApiError] = {
        400: Invalid,
        401: Forbidden,
        403: Forbidden,
        404: NotFound,
        409: AlreadyExists if reason == "AlreadyExists" else Conflict,
        410: Gone,
        422: Invalid,
    }.get(status, ApiError)
    return family(status, reason, message, answer.get("details") or {})


def _own_namespace() -> str | None:
    try:
        return Path(SERVICE_ACCOUNT).with_name("namespace").read_text().strip() or None
    except OSError:
        return None
