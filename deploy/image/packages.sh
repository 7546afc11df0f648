# Install the hash-locked packages of the file $1 and of the extras $2, such as "heif,jxl", into /opt/venv,
# and remove what the service does not use.
set -eu
requirements=$1 extras=$(echo "$2" | tr ',' ' ')
set -- --requirement "$requirements"
for extra in $extras; do
  case $extra in
    heif | jxl) set -- "$@" --requirement "${requirements%/*}/$extra.txt" ;;
    *) echo "EXTRAS=$extra: use heif, jxl, or heif,jxl" >&2; exit 2 ;;
  esac
done
python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --no-compile \
  --only-binary :all: --require-hashes "$@"
cd /opt/venv/lib/python3*/site-packages

# Parts of wheels that serving never imports.
find . -depth \( -type d \( -name tests -o -name test -o -path './nvidia/*/include' \) -o -name '*.pyi' \
  -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.a' \) -exec rm -rf {} +
rm -rf numpy/f2py numpy/distutils \
  onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/datasets
# Only C programs use this library; the Python module has its own copy, also for the CUDA provider.
rm -f onnxruntime/capi/libonnxruntime.so*

echo /app >fledge.pth
printf '#!/opt/venv/bin/python\nimport sys\nfrom fledge import main\nsys.exit(main())\n' >/opt/venv/bin/fledge
chmod 755 /opt/venv/bin/fledge
# unchecked-hash, because the sources never change, so Python need not compare them.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$PWD"
