"""What Ray's processes on every node need in their environment before they start, for the service to run well.

The same values are in serve/service.yaml (as a comment), cluster/local.py, cluster/kubernetes/template/cluster.yaml and
ray_cluster.yaml, which cannot import this; tests/serve/test_environment.py compares them.
"""

from __future__ import annotations

ENVIRONMENT = {
    # A request whose ingress replica dies is sent to another one (serve.proxy).
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    # On a busy machine a proxy takes longer to start than Ray's limit of 5 s, and Ray would end and restart it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Requests run in a replica's own event loop instead of a thread beside it. Slow work is in threads here anyway, and
    # a request costs a third less.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A replica's OpenMP threads sleep while they wait for work, so another replica can use the cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}
