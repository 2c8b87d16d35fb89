"""The network on CPUs: fused for inference, faster gradients. Nothing else imports this but tasks and tools."""
