"""Events for other people's tools: Prometheus metrics, OpenTelemetry spans. Both are optional extras."""
