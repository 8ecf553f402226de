{{- define "redisgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "redisgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "redisgate.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "redisgate.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "redisgate.selector" -}}
app.kubernetes.io/name: {{ include "redisgate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "redisgate.labels" -}}
{{ include "redisgate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "redisgate.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "redisgate.secretName" -}}
{{- if .Values.secret.existingSecret -}}
{{- .Values.secret.existingSecret -}}
{{- else if .Values.secret.create -}}
{{- include "redisgate.fullname" . -}}
{{- else -}}
{{- fail "secret.existingSecret names the Secret with the key secret-key; or secret.create makes one for a trial" -}}
{{- end -}}
{{- end -}}

{{- define "redisgate.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "redisgate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Variables from the Secret; those of the database only for a control plane, which may do more in the cluster, too */}}
{{- define "redisgate.secretEnv" -}}
{{- if and .Values.controlPlane.enabled .Values.secret.optional -}}
{{- fail "secret.optional is for a gateway without a database: with controlPlane.enabled all pods need the same secret-key" -}}
{{- end -}}
{{- if and .Values.secret.create (not .Values.secret.existingSecret) (ne .Values.controlPlane.enabled (ne .Values.secret.databaseUrl "")) -}}
{{- fail "secret.databaseUrl and controlPlane.enabled go together" -}}
{{- end -}}
- name: REDISGATE_SECRET_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "redisgate.secretName" . }}
      key: secret-key
      {{- if .Values.secret.optional }}
      optional: true
      {{- end }}
{{- if .Values.controlPlane.enabled }}
- name: REDISGATE_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "redisgate.secretName" . }}
      key: database-url
{{- range $variable, $key := dict "REDISGATE_DATABASE_DIRECT_URL" "database-direct-url" "REDISGATE_ENCRYPTION_KEYS" "encryption-keys" "REDISGATE_AUDIT_KEY" "audit-key" }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ include "redisgate.secretName" $ }}
      key: {{ $key }}
      optional: true
{{- end }}
{{- end }}
{{- end -}}

{{- define "redisgate.commonEnv" -}}
- name: REDISGATE_STATE_DIR
  value: /var/lib/redisgate
{{- range $name, $value := .Values.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
