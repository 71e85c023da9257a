"""The serving room: OpenAI routes over one engine per replica, on Ray Serve.

    request → middleware (access log, size, token) → app (routes) → service (ids, templates, limits) → engine (slots)

`deploy` puts it on a cluster; `spec` says what is served; `sources` says where an adapter's files are.
"""
