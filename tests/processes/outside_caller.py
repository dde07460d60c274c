"""A caller that knows nothing but an address: jobs by HTTP, and their pictures from the store.

`python -m tests.processes.outside_caller URL JOBS`: a line once all are accepted, then one of JSON
with the bytes of each picture. Where a job fails it ends with what the job failed with.

`python -m tests.processes.outside_caller URL what-jobs`: a line for each job, how far it is.
"""

import json
import sys

from serve.client import Kelvin
from serve.requests import GenerateRequest


def main(url: str, jobs: int) -> None:
    with Kelvin(url, timeout_s=500) as kelvin:
        asked = [
            kelvin.submit(
                GenerateRequest(prompt="a blue square", num_inference_steps=100, num_images=2)
            )
            for _ in range(jobs)
        ]
        print("accepted", flush=True)
        results = [kelvin.wait(job.id) for job in asked]
        sizes = [len(kelvin.download(image)) for result in results for image in result.images]
    print(json.dumps({"sizes": sizes}), flush=True)


def what_jobs(url: str) -> None:
    with Kelvin(url, timeout_s=20) as kelvin:
        for job in kelvin.jobs():
            progress = job.progress and job.progress.model_dump(exclude_none=True, mode="json")
            print(job.id, job.status, json.dumps(progress), job.error, flush=True)


if __name__ == "__main__":
    if sys.argv[2] == "what-jobs":
        what_jobs(sys.argv[1])
    else:
        main(sys.argv[1], int(sys.argv[2]))
