@echo off
rem RedisGate from nothing, on Windows with Docker Desktop: removes what an earlier trial left, builds, starts, waits, opens the page.
setlocal
cd /d "%~dp0"

docker version >nul 2>&1
if errorlevel 1 (
  echo Docker does not answer. Start Docker Desktop, wait until it says that it is running, and run this file again.
  exit /b 1
)

echo This removes the containers AND THE DATA of an earlier trial of RedisGate on this machine.
choice /c YN /m "Go on"
if errorlevel 2 exit /b 0

docker compose down --volumes --remove-orphans
if errorlevel 1 goto failed
docker compose up --detach --build
if errorlevel 1 goto failed

echo Waiting for the service ...
set /a tries=0
:wait
curl --silent --fail --output nul http://localhost:3000/health/ready && goto ready
set /a tries+=1
if %tries% geq 60 goto late
timeout /t 2 /nobreak >nul
goto wait

:ready
echo.
echo   Dashboard   http://localhost:3000
echo   Sign in     demo@redisgate.dev / Demo123456!
echo   Stop        docker compose down
start "" http://localhost:3000
exit /b 0

:late
echo The service did not answer within two minutes. Its log:
docker compose logs --tail 50 gateway
exit /b 1

:failed
echo That did not work; what Docker says stands above. docs\TROUBLESHOOTING.md has the usual causes.
exit /b 1
