"""The broker: the trusted process between a person, the policy, the log and the sealed model."""

from airgap.serve.broker import Answer, Broker, Job
from airgap.serve.present import check_outputs, present
from airgap.serve.session import open_broker

__all__ = ["Answer", "Broker", "Job", "check_outputs", "open_broker", "present"]
