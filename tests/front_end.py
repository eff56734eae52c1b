"""What the browser tests run on ComfyUI's page."""

# Also when the workflow that the page begins with is there, which would replace one that is loaded before.
READY = """window.app?.extensionManager?.workflow?.activeWorkflow
    && !!window.LiteGraph?.registered_node_types.ConceptViewer"""

# Queues the workflow; "execution_success ..." or "execution_error ..." when it ends.
RUN = """async () => {
    const { api } = await import("/scripts/api.js");
    const end = new Promise((resolve) => {
        for (const type of ["execution_success", "execution_error"]) {
            api.addEventListener(type, (e) => resolve(`${type} ${JSON.stringify(e.detail)}`));
        }
    });
    await app.queuePrompt(0, 1);
    return await end;
}"""
