# For GPU servers: torch's wheels bring CUDA's libraries, the host brings the driver and its container toolkit.
#   docker build -t diva-lab .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/diva-lab/runs" diva-lab diva-lab presets
FROM python:3.11-slim

# git: a run records the commit that it was made with
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*

WORKDIR /diva-lab
COPY . .
RUN python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -e .

CMD ["diva-lab", "--help"]
